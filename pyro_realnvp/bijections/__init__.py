# SPDX-License-Identifier: Apache-2.0
"""The bijections from which flows are built. Each is one class."""
