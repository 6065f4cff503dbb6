"""What is installed, which devices there are, and what is wrong with them.

It is made for broken installations. So nothing is imported here but the standard library and this
package's own tables: packages are looked up by their metadata, and what has to be imported is
imported in a process of its own, whose crash is a finding. Every finding that is a problem says the
way out.
"""
