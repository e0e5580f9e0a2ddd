"""Imported by the fork server last: see warm.py."""

from tests import warm

warm.use()
warm.be_a_child()
