# SPDX-License-Identifier: Apache-2.0
"""What flows are made of: each bijection is one class."""
