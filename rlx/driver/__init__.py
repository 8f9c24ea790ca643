"""The run: what is drawn, scored, learnt, published and kept. It drives trainer ranks and engines and does no rank's work."""
