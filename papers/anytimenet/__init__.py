"""AnytimeNet (Kim, Bradford, Shao): what is executed, what it takes, how accuracy and confidence
grow with the iterations.
"""
