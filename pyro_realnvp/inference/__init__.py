# SPDX-License-Identifier: Apache-2.0
"""Guides: made from a model, trained, judged, and used to draw from the posterior."""
