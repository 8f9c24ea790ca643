"""Commands. Argument parsing and exit status only; the work is done by the packages below."""
