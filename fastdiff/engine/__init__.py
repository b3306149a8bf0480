# SPDX-License-Identifier: Apache-2.0
"""What executes a plan, and knows nothing of graphs or gradients."""
