// Package docs holds the guides, the decisions and the changes; its test checks their links.
package docs
