// Package fib follows the kernel's route tables for one interface: announcements, dumps and answered probes go in, and out
// comes for each prefix the one answer that the kernel gives to packets which it hands to that interface. It makes no system
// call and knows no clock.
//
// Tables. Followed are the routes of the configured tables, in the order in which the routing rules of a family look at
// them (Order): a route of a later table counts only where none through our interface in an earlier one covers it. A configured
// table that no rule looks at answers nothing, because the kernel does not ask it (kernel.md A20); a table that is not
// configured is not followed, whatever the rules say. The claim is for TOS 0, no mark and an unspecified source (V15).
//
// Foreign routes. Where the kernel chooses another interface or a blackhole it hands us no packet, so what is claimed there
// is of no consequence: foreign routes are not kept. But NLM_F_REPLACE takes the first of a key, whoever's (A9), so of
// every route of ours it is known how many strangers stand before it.
//
// Doubt. Where messages do not tell whether a route is there, or which of two stands first, it stays and is doubtful
// (design.md, law 2): Doubts lists what a RTM_F_FIB_MATCH could settle, Settle takes the kernel's answer.
package fib
