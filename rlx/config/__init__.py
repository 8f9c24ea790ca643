"""Typed, frozen configuration. This package never imports torch."""
