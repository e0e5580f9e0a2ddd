"""Imported by the fork server last: see warm.py."""

import gc

from tests import warm

warm.use()
warm.be_a_child()
# What is imported stays: no child's garbage collection, of which vLLM asks for many, walks through it again.
gc.freeze()
