"""Calibration of recurrent twins by closed forms, from what their attention layers do on a little text.

Our form of the first phase of Taylor-Calibrate (arXiv 2606.16429); `faithful` is the published one.
"""
