# SPDX-License-Identifier: Apache-2.0
"""Published samplers as plain loops, one file a family: what the tables are checked against."""
