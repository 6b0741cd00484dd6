"""How a model becomes a program: quantization, export and lowering, as typed building blocks.

Knows `model`, torchao and the exporter; `conf/recipe/` names which blocks make a recipe.
"""
