"""Kinds of scenes from outside."""

from kinds import Kind

KINDS: list[Kind] = []
