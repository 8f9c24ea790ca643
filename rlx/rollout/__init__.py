"""Rollouts: SGLang engines over HTTP, their router, groups of samples, record and replay; the embedded engine."""
