# SPDX-License-Identifier: Apache-2.0
"""The demo: a real adapter, moved between two real models, scored on a real task."""
