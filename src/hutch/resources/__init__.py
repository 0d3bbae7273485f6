"""What the host has, who holds how much of it, and how it is given out and taken back.

Decisions are pure (`cpus`, `admission`, `ladder`): what is there goes in as data, what is to
be done comes out as data. The engine has the effects.
"""
