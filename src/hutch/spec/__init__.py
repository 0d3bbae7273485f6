"""What the user asked for: the validated, immutable description of an instance.

Import from the modules: `model` for the values, `build` for making them from options.
"""
