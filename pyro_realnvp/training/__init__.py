# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood: the loop, its batches, its checkpoints."""
