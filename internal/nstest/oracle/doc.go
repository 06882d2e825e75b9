// Package oracle drives a kernel's route table at random and asks the kernel what became of it (kernel.md O1): whoever follows
// the routes through an interface must say the same. It makes changes, and knows the traps of RTM_F_FIB_MATCH (kernel.md V14);
// what is followed, and how, is its callers' business.
package oracle
