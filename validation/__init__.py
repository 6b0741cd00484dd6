"""The judge: recorded calls, eager beside the program, figures with bounds, and the proof of a program's format.

Knows the network, the quantized weights and the runtime; needs no exporter, so a device's host can judge.
"""
