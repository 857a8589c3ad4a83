"""
The flags of the larger commands and their defaults, and how all commands end.

This package imports the standard library only. `import flowback_hf` takes seconds, because it imports torch, diffusers
and transformers; `--help` and a wrong flag are answered before that.
"""
