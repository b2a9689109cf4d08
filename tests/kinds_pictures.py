"""Kinds of pictures from outside."""

from kinds import Kind

KINDS: list[Kind] = []
