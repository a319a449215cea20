# SPDX-License-Identifier: Apache-2.0
"""Training by maximum likelihood, with the loop, the batches and the checkpoints that it needs."""
