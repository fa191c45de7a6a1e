"""Rendered products, one a file: each knows its normals, its logical and its structural defects.

A product draws one `Rendered` picture from a generator; `scenes` writes the folders.
"""
