# SPDX-License-Identifier: Apache-2.0
"""What fastdiff is measured against: other libraries, eager PyTorch, its compiler, its graphs."""
