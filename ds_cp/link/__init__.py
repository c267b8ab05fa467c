"""Connections between the processes of a job on several hosts: one port, on which each side proves
that it knows the job's secret, and on which the ranks' store and their supervisors' words travel.
"""
