"""Imported by the fork server last: see warm.py."""

import gc

import setproctitle
from tests import warm

warm.use()
warm.be_a_child()
# vLLM's processes call themselves by name: where that goes is looked for once, beside the environment it began with.
setproctitle.getproctitle()
# What is imported stays: no child's garbage collection, of which vLLM asks for many, walks through it again.
gc.freeze()
