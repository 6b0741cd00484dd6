"""How a model becomes a program: quantization, the exported form, lowering, as typed building blocks."""
