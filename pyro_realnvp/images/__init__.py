# SPDX-License-Identifier: Apache-2.0
"""Flows of images, and densities of integer pixels."""
