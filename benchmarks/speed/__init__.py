"""How fast is SmolDriver, and how far from what the machine can do?"""
