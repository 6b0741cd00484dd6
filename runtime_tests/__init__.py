"""The harness: `pytest runtime_tests --artifact DIR` runs it against any artifact folder.

Needs the artifact alone: no checkpoint, no torchao, no Hydra.
"""
