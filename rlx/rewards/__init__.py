"""Rewards: one verifier a file behind a small Protocol, and the pool that runs them."""
