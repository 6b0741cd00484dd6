"""What travels with an artifact: manifest, provenance, signature, bundle, and the baseline it is held against.

Written by the road's last stage, checked by whoever gets the artifact.
"""
