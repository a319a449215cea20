# SPDX-License-Identifier: Apache-2.0
"""Guides: how they are made from a model, trained, diagnosed, and used to sample the posterior."""
