"""Data: loading rows, chat formatting, packing into training rows."""
