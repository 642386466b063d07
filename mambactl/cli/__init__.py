"""The command line: parse, call one stage, print one line. Nothing here loads torch early."""
