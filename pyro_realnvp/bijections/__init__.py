# SPDX-License-Identifier: Apache-2.0
"""The bijections of which flows are composed, each as one class."""
