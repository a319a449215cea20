# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of quality and speed, beside the libraries that people use today: ``python -m benchmarks``."""
