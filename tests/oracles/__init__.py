# SPDX-License-Identifier: Apache-2.0
"""The papers' loops in plain lines, against which plans are tested."""
