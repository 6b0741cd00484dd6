"""What people look at: pages, plots, tables, comparisons, and what a CI shows.

Draws what manifests and figures hold; measures nothing but what the plots need of a validation.
"""
