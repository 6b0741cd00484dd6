"""The harness: `pytest runtime_tests --artifact DIR` runs it against any artifact folder."""
