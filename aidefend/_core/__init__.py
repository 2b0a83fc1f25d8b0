"""The shared room: conventions that every other room keeps. It imports nothing else of aidefend."""
