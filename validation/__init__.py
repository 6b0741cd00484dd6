"""The judge: recorded calls, eager beside the program, figures with bounds, and the proof of a program's format.

Knows the runtime, and of recipes the quantized weights; needs no exporter, so an artifact can be judged anywhere.
"""
