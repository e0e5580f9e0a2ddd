"""Who may do what: roles, the file of tokens, and the gate that every call passes.

call --metadata--> gate.py --(tokens.py: who is it?  roles.py: may it?)--> handler
                      |
                      +--> refusals.py --> event log
"""
