# SPDX-License-Identifier: Apache-2.0
"""Training by maximum likelihood: the loop, the batches and the checkpoints."""
