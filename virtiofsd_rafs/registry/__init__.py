"""The registry protocol without I/O: references, authentication, manifests, and exchanges as plan -> reply ->
next step.

``backends/`` sends what these modules plan. Time, status and bytes are arguments.
"""
