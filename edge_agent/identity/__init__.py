"""Who a device is: its key, its certificates, how it gets them and keeps them."""
