"""Operations on arrays alone: attention, through one function, and rotary position embedding.

Knows no model. What an array's axes are is in the letters of docs/architecture.md.
"""
