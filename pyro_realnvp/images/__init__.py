# SPDX-License-Identifier: Apache-2.0
"""Flows of images, and distributions of integer images."""
