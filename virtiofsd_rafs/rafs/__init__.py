"""rafs"""
