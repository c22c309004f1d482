"""What `tightfit run` does once its arguments are read: one module for each way of running."""
